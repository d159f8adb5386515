"""From photos wherever they lie to the batches of a step; every draw depends on numbers alone."""
