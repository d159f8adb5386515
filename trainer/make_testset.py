"""`python -m trainer.make_testset`: another name of `python -m trainer.evaluate testset`."""

from .evaluate.commands import door

if __name__ == "__main__":
    door("testset")
