"""The embedded small model, part by part: autoencoder, tagger, DAPE, prior, control. `python -m trainer.nano`."""
