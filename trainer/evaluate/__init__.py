"""Measuring: picture quality, recognition, what the tagger gains from stage 1, and whether the semantics are used.

python -m trainer.evaluate --sr DIR [--hr DIR] [--lr DIR] --json REPORT
python -m trainer.evaluate sets --pairs DIR … --originals DIR … --photos DIR … --out DIR
python -m trainer.evaluate semantics --sr DIR --hr DIR --tagger FILE --json REPORT
python -m trainer.evaluate.degrade --photos LIST --out DIR
python -m trainer.evaluate.dape --tagger FILE --dape FILE --photos LIST --json REPORT
python -m trainer.evaluate.grounding --tagger FILE --photos LIST --json REPORT
python -m trainer.evaluate.ablation --hr DIR --lr DIR --out DIR
"""
