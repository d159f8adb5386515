"""How good pictures are: metrics, with the settings that they depend on, of folders of results."""
