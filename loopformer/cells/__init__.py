"""Cells: what one step of the loop does. One file a part."""
