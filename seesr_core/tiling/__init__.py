"""Large pictures in tiles: where the tiles lie, how they run, and the autoencoder's own."""
