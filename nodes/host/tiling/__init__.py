"""Tiled sampling inside the host: tiles, conditions, ControlNets, memory."""
