"""Version 1 of Djinn's wire protocol, generated from protos/djinn/v1."""
