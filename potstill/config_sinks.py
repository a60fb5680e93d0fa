"""The [sinks] table: who is told a run's numbers beside its own folder. Nobody is, unless a table names them.

    tensorboard   event files in the run's folder       mlflow    a tracking server, or a local store
    wandb         Weights & Biases                      trackio   a local database, or a server of one's own

Secrets are named, never written: env:NAME or file:PATH.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.references import SecretRef, Stands, StateFile, Url
from potstill.section import Count, Positive, Section

FolderBelow = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$"), Stands.BELOW]
"""Of a folder that stays below another: not absolute, and without parts that begin with a dot."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. -]{0,99}$")]


class TensorBoardConfig(Section):
    """Event files that TensorBoard reads: `tensorboard --logdir runs`."""

    folder: FolderBelow = "tensorboard"
    """Below the run's folder."""


class WandbConfig(Section):
    """Weights & Biases. Needs the extra `wandb`."""

    project: Label
    """The project that the run is one of."""
    entity: Label | None = None
    """Team or user whose project it is. None: as the key says."""
    mode: Literal["online", "offline"] = "online"
    """offline: files below the run's folder, which `wandb sync` sends later."""
    url: Url | None = None
    """Of a W&B server of one's own. None: the public one."""
    secret_ref: SecretRef | None = None
    """Of mode = "online": where the API key is kept. Neither the environment nor a file that `wandb login` left is
    looked at."""

    @model_validator(mode="after")
    def _online_has_a_key(self) -> WandbConfig:
        if self.mode == "online" and self.secret_ref is None:
            raise ValueError(
                'mode "online" goes with secret_ref, where the API key is kept: env:NAME or file:PATH; '
                'mode "offline" needs none'
            )
        return self


class MlflowConfig(Section):
    """MLflow tracking. Needs the extra `mlflow`."""

    tracking_uri: Annotated[Url, Field(pattern=r"^(https?://|sqlite:///|file://).+$")]
    """A tracking server, e.g. http://127.0.0.1:5000; sqlite:///PATH, which needs all of the package mlflow; or
    file:///PATH, which MLflow maintains no more."""
    experiment: Label = "potstill"
    """The experiment that the run is one of; made if it is not there."""
    secret_ref: SecretRef | None = None
    """Where the server's bearer token is kept, if it wants one."""

    @property
    def url(self) -> str | None:
        """Where the network comes in."""
        return self.tracking_uri if self.tracking_uri.startswith("http") else None

    @model_validator(mode="after")
    def _tokens_are_for_servers(self) -> MlflowConfig:
        if self.secret_ref is not None and self.url is None:
            raise ValueError("secret_ref goes with a tracking_uri of a server: http:// or https://")
        return self


class TrackioConfig(Section):
    """Trackio, on this machine or on a Trackio server of one's own; never a Space. Needs the extra `trackio`."""

    project: Label
    """The project that the run is one of."""
    folder: StateFile = "runs/trackio"
    """Of its databases, which `TRACKIO_DIR=runs/trackio trackio show` reads. Several runs share one."""
    url: Url | None = None
    """Of a server of one's own (`trackio show`). None: the folder is all there is."""
    secret_ref: SecretRef | None = None
    """Of `url`: where its write token is kept."""

    @model_validator(mode="after")
    def _servers_have_a_token(self) -> TrackioConfig:
        if (self.url is None) != (self.secret_ref is None):
            raise ValueError("url goes with secret_ref, where the server's write token is kept: env:NAME or file:PATH")
        return self


class SinksConfig(Section):
    """A sink that fails, hangs or is slow changes nothing about a run: what it misses is in the run's folder."""

    tensorboard: TensorBoardConfig | None = None
    """None: no event files."""
    wandb: Annotated[WandbConfig, Stands.OUTSIDE] | None = None
    """None: W&B is told nothing."""
    mlflow: Annotated[MlflowConfig, Stands.OUTSIDE] | None = None
    """None: MLflow is told nothing."""
    trackio: Annotated[TrackioConfig, Stands.OUTSIDE] | None = None
    """None: Trackio is told nothing."""
    queue: Count = 1000
    """Records that wait for a sink; beyond them the oldest go, and are counted. Too few: gaps where a sink is slow for
    a moment; too many: memory while one is away."""
    close_s: Positive = 10.0
    """Seconds after the end of the run in which all sinks together may take what is left. Too few: the last steps are
    missing there; too many: a sink that is away holds the process that long."""
