"""The node agent's interface; `agent_pb2` and `agent_grpc` are generated from `agent.proto` by `dev/protoc`."""
