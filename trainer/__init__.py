"""The two training stages of SeeSR, the degradation they train on, and the measurements of what they produce."""
