"""Instruments that say how many bytes a training step holds, and the record they all fill."""
