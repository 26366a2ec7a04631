"""CRIU image messages, the fields that SMR reads."""
