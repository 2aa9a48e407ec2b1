"""Thin bridges to training stacks, each imported only where it is used."""
