"""`python -m trainer.evaluate.degrade`: another name of `python -m trainer.evaluate degrade`."""

from .commands import door

if __name__ == "__main__":
    door("degrade")
