"""`python -m trainer.evaluate.grounding`: another name of `python -m trainer.evaluate grounding`."""

from .commands import door

if __name__ == "__main__":
    door("grounding")
