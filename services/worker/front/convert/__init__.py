"""Protobuf to and from the front's own types, field by field; nothing else knows both."""
