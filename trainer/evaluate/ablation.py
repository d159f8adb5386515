"""`python -m trainer.evaluate.ablation`: another name of `python -m trainer.evaluate ablation`."""

from .commands import door

if __name__ == "__main__":
    door("ablation")
