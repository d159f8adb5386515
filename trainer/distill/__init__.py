"""Students of few steps: a model's steps run and compared end to end, and a teacher of many steps distilled."""
