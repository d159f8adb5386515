"""Test sets: made from clean photos or real pairs, and measured whole."""
