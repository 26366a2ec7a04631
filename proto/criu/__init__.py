"""CRIU's image files, the messages that SMR reads; `images_pb2` is generated from `images.proto` by `dev/protoc`."""
