"""A TCP relay that can cut, stall, redirect or garble connections, and a gRPC server that sends nonsense."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import grpc
import grpc.aio

HOST = "127.0.0.1"


@contextlib.contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a separate thread; cancel its tasks at the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Relay:
    """Forwards connections to a target, and fails on request."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: tuple[str, int]) -> None:
        self._home = self._target = target
        self._loop = loop
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_garbled = False
        self._connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self._run(self._listen())

    def cut(self) -> None:
        """Reset every connection, and refuse new ones."""
        self._run(self._cut())

    def restore(self) -> None:
        """Forward everything to the first target again."""
        self._run(self._restore())

    def hold(self) -> None:
        """Accept everything but forward nothing, like a network that drops packets."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def garble(self) -> None:
        """Reset every connection, and answer new ones with random bytes."""
        self._run(self._garble())

    def lead_to(self, target: tuple[str, int]) -> None:
        """Reset every connection, and forward new ones to another target."""
        self._target = target
        self._loop.call_soon_threadsafe(self._reset)

    def close(self) -> None:
        """End."""
        self._run(self._cut())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        self._reset()

    async def _garble(self) -> None:
        self._is_garbled = True
        self._reset()

    async def _restore(self) -> None:
        if self._is_garbled or self._target != self._home:
            self._is_garbled, self._target = False, self._home
            self._reset()
        self._flows.set()
        if not self._server:
            await self._listen()

    def _reset(self) -> None:
        for writer in self._connections:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_garbled:
            with contextlib.suppress(OSError):
                while await reader.read(65536):
                    writer.write(os.urandom(4096))
                    await writer.drain()
            writer.close()
            return
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._connections |= {writer, back}
        try:
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        finally:
            self._connections -= {writer, back}
            writer.transport.abort()
            back.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@contextlib.contextmanager
def relay(target: tuple[str, int]) -> Iterator[Relay]:
    """A relay on a free port."""
    with running_loop() as loop:
        made = Relay(loop, target)
        try:
            yield made
        finally:
            made.close()


class _Nonsense(grpc.GenericRpcHandler):
    """Answers every method with bytes that are not a valid message, or with an empty message."""

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        async def answer(request: bytes, context: object) -> bytes:
            return os.urandom(512) if request[-1] % 2 else b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextlib.contextmanager
def nonsense() -> Iterator[tuple[str, int]]:
    """Run a gRPC server that only sends nonsense; yield its address."""

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(handlers=[_Nonsense()])
        port = server.add_insecure_port(f"{HOST}:0")
        await server.start()
        return server, port

    async def stop(server: grpc.aio.Server) -> None:
        await server.stop(None)

    with running_loop() as loop:
        server, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
        try:
            yield HOST, port
        finally:
            asyncio.run_coroutine_threadsafe(stop(server), loop).result()
