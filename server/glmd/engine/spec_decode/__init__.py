"""Speculative decoding with the MTP layer."""
