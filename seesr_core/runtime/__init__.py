"""What a run has to work with: devices, memory, time, and files that appear whole or not at all."""
