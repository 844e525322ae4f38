"""Orbax, behind one small module."""
