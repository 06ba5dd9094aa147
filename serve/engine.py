"""One vLLM engine behind the endpoint: holds versions of the model, and answers with vLLM's own OpenAI application."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.exceptions import RequestValidationError
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm.deployment import LLMServer
from starlette.requests import Request
from starlette.responses import JSONResponse

from serve.asgi import Head, run_asgi
from serve.errors import ApiError, malformed
from serve.swap import SwapLock
from serve.versions import Version, weights_digest

LOAD_TIMEOUT_S = 1800.0
DRAIN_TIMEOUT_S = 10.0
PAUSE_PER_REQUEST_S = 0.02
LONGEST_PAUSE_S = 0.1
logger = logging.getLogger(__name__)


class LocalEngine(VLLMEngine):
    """Without processes that are of no use here: one that would download the model, which is a folder already; and on a
    CPU one for the only worker. The engine's process spins on a processor while it waits for that. vLLM would have it
    so for the sake of OpenMP's settings, but `cpu_engine_variables` makes them for the whole process."""

    async def start(self) -> None:
        """Start the engine; called once."""
        self.llm_config.get_or_create_callback().ctx.run_init_node = False
        await super().start()

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        parallel = vllm_engine_config.parallel_config
        if parallel.distributed_executor_backend == "mp" and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


class Engine(LLMServer):
    """A deployment of `ray.serve.llm` that is asked through vLLM's own application, inside its process, and whose
    versions change by `reconfigure` while it answers."""

    async def __init__(self, llm_config: Any):  # type: ignore[misc]  # as Serve allows
        await super().__init__(llm_config, engine_cls=LocalEngine)
        assert self.engine is not None
        self._app: Any = await self.engine.build_asgi_app()
        self._app.add_exception_handler(RequestValidationError, _refuse)
        self._app.middleware_stack = None  # vLLM has built it already; Starlette does so again with the handler
        self._models = self._app.state.openai_serving_models
        self._swap = SwapLock()
        self._own: Version | None = None
        """Whose weights the engine itself has."""
        self._adapters: dict[str, Version] = {}
        self._state: tuple[int, list[str], dict[str, str]] = (-1, [], {})
        self._broken = ""

    async def reconfigure(self, wanted: dict[str, Any]) -> None:
        """Hold the versions of `wanted`; called by Serve at the start and whenever `user_config` changes.

        A version that cannot be loaded leaves what was held before; `state` says why.
        """
        versions = [Version(**one) for one in wanted["versions"]]
        faults = {}
        for version in versions:
            try:
                await (self._load_adapter(version) if version.rank else self._load_weights(version))
            except Exception as error:
                logger.exception("cannot load %s", version.name)
                faults[version.name] = str(error)
        for name in self._adapters.keys() - {version.name for version in versions}:
            await self._unload_adapter(name)
        held = [*([self._own.name] if self._own else []), *self._adapters]
        self._state = (wanted["serial"], held, faults)

    async def state(self) -> tuple[int, list[str], dict[str, str]]:
        """Of the last `reconfigure`: its serial number, the names of the versions held since, and why others could not
        be loaded, by their names."""
        return self._state

    async def check_health(self) -> None:
        """Called by Serve, which starts a replica anew that raises."""
        if self._broken:
            raise RuntimeError(self._broken)
        await super().check_health()

    async def _load_weights(self, version: Version) -> None:
        """In place: answers under way end on the old weights, later ones wait for the new."""
        if self._own == version:
            return
        await _check_revision(version)
        if self._own or version.folder != self._llm_config.model_loading_config.model_source:
            async with asyncio.timeout(LOAD_TIMEOUT_S), self._swap.alone():
                try:
                    await self.collective_rpc("reload_weights", kwargs={"weights_path": version.folder})
                    await self._forget_caches()
                except BaseException:
                    self._broken = f"the weights of {version.name} were loaded in part only"
                    raise
                self._take(version)
        else:
            self._take(version)

    def _take(self, version: Version) -> None:
        self._own = version
        paths = self._models.base_model_paths
        paths[0] = type(paths[0])(version.name, version.folder)

    async def _forget_caches(self) -> None:
        """None may hold anything of the old weights. Blocks of the last answers may take a moment to be free."""
        assert self.engine is not None
        client: Any = self.engine._engine_client
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            while not await client.reset_prefix_cache():
                await asyncio.sleep(0.05)
        await client.reset_mm_cache()
        await client.reset_encoder_cache()

    async def _load_adapter(self, version: Version) -> None:
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        if version.name in self._adapters:
            return
        await _check_revision(version)
        request = LoadLoRAAdapterRequest(lora_name=version.name, lora_path=version.folder)
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            answer = await self._models.load_lora_adapter(request)
        if not isinstance(answer, str):
            raise ValueError(answer.error.message)
        self._adapters[version.name] = version

    async def _unload_adapter(self, name: str) -> None:
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        del self._adapters[name]
        await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))

    def _pause(self) -> float:
        """Between pieces of one answer. Each costs three processes some time, so many answers send larger ones."""
        return min(self._swap.answers * PAUSE_PER_REQUEST_S, LONGEST_PAUSE_S)

    async def answer(self, path: str, body: bytes, adapter: str, exactly: str) -> AsyncIterator[Head | bytes]:
        """vLLM's answer to a POST of `body`: first its head, then its body in pieces as they come.

        The engine's own weights answer, unless `adapter` names one. `exactly` names the version that must answer, ""
        if a newer one may: the gateway may not know yet that it was replaced.
        """
        async with self._swap.shared():
            held = self._adapters.get(adapter) if adapter else self._own
            if held is None or self._broken:
                later = ApiError(503, "this version is not loaded at the moment; come back later", "not_loaded")
                yield Head(later.status, "application/json", adapter, "")
                yield json.dumps(later.body).encode()
                return
            if exactly and held.name != exactly:
                gone = ApiError(404, f"{exactly} is not served any more", "model_not_found", "model")
                yield Head(gone.status, "application/json", held.name, held.revision)
                yield json.dumps(gone.body).encode()
                return
            request = json.loads(body) | {"model": held.name}
            # Closed before the lock is let go, so that no weights change under an answer whose client has left.
            async with aclosing(run_asgi(self._app, path, json.dumps(request).encode(), self._pause)) as messages:
                async for message in messages:
                    if isinstance(message, bytes):
                        yield message
                    else:
                        status, content_type = message
                        yield Head(status, content_type, held.name, held.revision)


async def _refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    """In place of vLLM's handler, which shows pydantic's own records."""
    fault = error.errors()[0]
    _body, *field = fault["loc"]
    refused = malformed(str(field[0]) if field else None, fault["msg"])
    return JSONResponse(refused.body, refused.status)


async def _check_revision(version: Version) -> None:
    found = await asyncio.to_thread(weights_digest, version.folder)
    if found != version.revision:
        raise ValueError(
            f"the weights in {version.folder} are {found} now, but {version.name} has {version.revision}: that run was "
            f"replaced, so promote what is there now"
        )
