"""The tracking section."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag, require


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Tracking: TensorBoard, Weights & Biases, Trackio and MLflow, in addition to metrics.jsonl."""

    tensorboard_dir: str | None = flag(
        None, "TensorBoard: folder of event files, of this run only; default off", metavar="DIR"
    )
    tensorboard_queue_size: int = flag(
        100, "TensorBoard: size of the queue of pending events", within="[1, inf)", needs="tensorboard_dir"
    )
    wandb_project: str | None = flag(
        None, "Weights & Biases: project of the run; offline without a login; default off", metavar="NAME"
    )
    wandb_exp_name: str | None = flag(
        None, "Weights & Biases: name of the run; default the name of its folder", metavar="NAME", needs="wandb_project"
    )
    wandb_group: str | None = flag(None, "Weights & Biases: group of the run", metavar="NAME", needs="wandb_project")
    wandb_save_dir: str | None = flag(
        None,
        "Weights & Biases: folder of its local files; default the run folder",
        metavar="DIR",
        needs="wandb_project",
    )
    trackio_project: str | None = flag(
        None, "Trackio: project of the run; in TRACKIO_DIR on this machine; default off", metavar="NAME"
    )
    mlflow_experiment: str | None = flag(None, "MLflow: experiment of the run; default off", metavar="NAME")
    mlflow_tracking_uri: str | None = flag(
        None,
        "MLflow: its server or database; default MLFLOW_TRACKING_URI, else sqlite:///mlflow.db",
        metavar="URI",
        needs="mlflow_experiment",
    )

    def __post_init__(self):
        super().__post_init__()
        forbidden = set(self.wandb_project or "") & set("/\\#?%:")
        message = "a project's name has none of / \\ # ? % : in it; change it"
        require(not forbidden, "wandb_project", self.wandb_project, message)
