"""The client and answers that are not whole or not JSON."""

import asyncio
import contextlib
import socket
import threading

import pytest

from glm.errors import EngineError
from glm.inference.client import EngineClient

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CUT_OFF = HEAD + b"Content-Length: 100\r\n\r\n{"
WHOLE = HEAD + b"Content-Length: 13\r\n\r\n{\"text\": \"x\"}"


@contextlib.contextmanager
def answering(*answers: bytes):
    """A server that gives each connection the next answer, the last one for ever, and closes; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def serve():
            turn = 0
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return  # the test is over
                with connection:
                    connection.recv(65_536)
                    connection.sendall(answers[min(turn, len(answers) - 1)])
                turn += 1

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def post(url, retries):
    async def go():
        async with EngineClient(url, "key", connection_retries=retries) as client:
            return await client._post("/generate", {}), client.retried

    return asyncio.run(go())


def test_an_answer_that_breaks_off_is_asked_for_again():
    with answering(CUT_OFF, WHOLE) as url:
        assert post(url, 3) == ({"text": "x"}, 1)


def test_answers_that_always_break_off_are_an_error():
    with answering(CUT_OFF) as url, pytest.raises(EngineError, match="no whole answer in 2 attempts"):
        post(url, 1)


@pytest.mark.parametrize("answer", [
    HEAD + b"Content-Length: 5\r\n\r\n{oops", HEAD + b"Content-Length: 2\r\n\r\n\xff\xfe", b"220 mail server\r\n\r\n",
])
def test_an_answer_that_is_not_json_or_not_http_is_an_error(answer):
    with answering(answer) as url, pytest.raises(EngineError, match=url):
        post(url, 0)
