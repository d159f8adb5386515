"""What a run takes, before it begins: parameters, memory, images, hours."""
