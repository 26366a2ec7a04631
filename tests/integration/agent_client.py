"""A client of the agent on gRPC's own library, in a process of its own: python agent_client.py SOCKET CALL [MEMBER=VALUE]...

Prints the replies, a line of JSON each, as they come; then, for a call that failed, {"status": .., "message": .., "error": {..}}.
The stubs that SMR uses are grpclib's: this is what others will call with.
"""

from __future__ import annotations

import json
import sys

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict

from smr.proto.agent import agent_pb2 as pb

STREAMS = {"Checkpoint": "CheckpointProgress", "Watch": "Event"}


def main(path: str, call: str, *members: str) -> None:
    """One call."""
    request = getattr(pb, f"{call}Request")()
    ParseDict({name: json.loads(value) for name, value in (member.split("=", 1) for member in members)}, request)
    reply = getattr(pb, STREAMS.get(call, f"{call}Response"))
    with grpc.insecure_channel(f"unix:{path}") as channel:
        make = channel.unary_stream if call in STREAMS else channel.unary_unary
        ask = make(
            f"/smr.agent.v1.Agent/{call}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        try:
            answer = ask(request)
            for message in answer if call in STREAMS else [answer]:
                say(MessageToDict(message, preserving_proto_field_name=True))
        except grpc.RpcError as error:
            found = dict(error.trailing_metadata() or ()).get("smr-error-bin", b"")
            detail = MessageToDict(pb.Error.FromString(found))
            say({"status": error.code().name, "message": error.details(), "error": detail})


def say(value: object) -> None:
    """A line, at once."""
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
