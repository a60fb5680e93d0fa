"""Every call as a method, for the sync client and the async one alike: the calls are described elsewhere, once each."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

from potstill.client import checkpoints, files, keys, results, runs, service, teachers
from potstill.client.drivers import AsyncDriver, SyncDriver
from potstill.client.steps import Call, Flow, Program

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Verb(Generic[P, R]):
    """A call or program as a method: `client.get_run("a")` describes it and has the client do it."""

    def __init__(self, describe: Callable[P, Call[R] | Program[R]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: SyncDriver, owner: type) -> Callable[P, R]: ...
    @overload
    def __get__(self, client: AsyncDriver, owner: type) -> Callable[P, Coroutine[Any, Any, R]]: ...
    def __get__(self, client: SyncDriver | AsyncDriver | None, owner: type) -> Any:
        if client is None:
            return self._describe

        @functools.wraps(self._describe)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.do(self._describe(*args, **kwargs))

        return method


class Tale(Generic[P, T]):
    """A flow as a method: `client.events("a")` is an iterator, or an asynchronous one."""

    def __init__(self, describe: Callable[P, Flow[T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: SyncDriver, owner: type) -> Callable[P, Generator[T]]: ...
    @overload
    def __get__(self, client: AsyncDriver, owner: type) -> Callable[P, AsyncGenerator[T]]: ...
    def __get__(self, client: SyncDriver | AsyncDriver | None, owner: type) -> Any:
        if client is None:
            return self._describe

        @functools.wraps(self._describe)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.iterate(self._describe(*args, **kwargs))

        return method


class Surface:
    """The service's API. Raises Refused for the service's no, ServiceError where it cannot be asked."""

    create_run = Verb(runs.create_run)
    plan_run = Verb(runs.plan_run)
    list_runs = Verb(runs.list_runs)
    each_run = Tale(runs.each_run)
    get_run = Verb(runs.get_run)
    update_run = Verb(runs.update_run)
    cancel_run = Verb(runs.cancel_run)
    pause_run = Verb(runs.pause_run)
    resume_run = Verb(runs.resume_run)
    retry_run = Verb(runs.retry_run)
    fork_run = Verb(runs.fork_run)
    delete_run = Verb(runs.delete_run)
    get_config = Verb(runs.get_config)
    config_text = Verb(runs.config_text)
    wait = Verb(runs.wait)
    watch = Tale(runs.watch)

    list_events = Verb(results.list_events)
    events = Tale(results.events)
    get_metrics = Verb(results.get_metrics)
    export_metrics = Verb(results.export_metrics)
    list_samples = Verb(results.list_samples)
    get_logs = Verb(results.get_logs)
    follow_logs = Tale(results.follow_logs)

    list_checkpoints = Verb(checkpoints.list_checkpoints)
    get_checkpoint = Verb(checkpoints.get_checkpoint)
    publish_checkpoint = Verb(checkpoints.publish_checkpoint)
    withdraw_checkpoint = Verb(checkpoints.withdraw_checkpoint)
    set_checkpoint_ttl = Verb(checkpoints.set_checkpoint_ttl)
    delete_checkpoint = Verb(checkpoints.delete_checkpoint)
    download_checkpoint = Verb(checkpoints.download_checkpoint)

    upload_file = Verb(files.upload_file)
    list_files = Verb(files.list_files)
    get_file = Verb(files.get_file)
    download_file = Verb(files.download_file)
    delete_file = Verb(files.delete_file)

    register_teacher = Verb(teachers.register_teacher)
    list_teachers = Verb(teachers.list_teachers)
    get_teacher = Verb(teachers.get_teacher)
    update_teacher = Verb(teachers.update_teacher)
    delete_teacher = Verb(teachers.delete_teacher)
    probe_teacher = Verb(teachers.probe_teacher)
    score = Verb(teachers.score)

    who_am_i = Verb(keys.who_am_i)
    create_key = Verb(keys.create_key)
    list_keys = Verb(keys.list_keys)
    get_key = Verb(keys.get_key)
    update_key = Verb(keys.update_key)
    rotate_key = Verb(keys.rotate_key)
    revoke_key = Verb(keys.revoke_key)
    list_audit = Verb(keys.list_audit)

    get_capabilities = Verb(service.get_capabilities)
    list_models = Verb(service.list_models)
    version = Verb(service.version)
    ready = Verb(service.ready)
