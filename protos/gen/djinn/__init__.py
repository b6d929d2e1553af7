"""Djinn's wire protocol: generated code."""
