"""`python -m trainer.evaluate.dape`: another name of `python -m trainer.evaluate dape`."""

from .commands import door

if __name__ == "__main__":
    door("dape")
