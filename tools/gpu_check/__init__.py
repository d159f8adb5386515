"""`python -m tools.gpu_check`: all that is to be learnt of a card, in one run of stated length."""
