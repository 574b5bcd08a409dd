"""``bertqa train``: fine-tune, pre-train, average checkpoints, and make the data."""

from bertqa.command import command, group
from training.data.commands import app as data_app
from training.options import AverageArguments, GlueArguments, PretrainArguments, SquadArguments

app = group("Train models: fine-tune, pre-train, average, and make the data.")
app.add_typer(data_app, name="data")
squad_app, glue_app = group("Fine-tune an encoder on SQuAD."), group("Fine-tune an encoder on a GLUE task.")
pretrain_app, average_app = group("Pre-train a BERT."), group("Average the weights of checkpoints.")


@command(squad_app, SquadArguments, extra="training")
@command(app, SquadArguments, extra="training")
def squad(options: SquadArguments) -> None:
    """Fine-tune a BERT encoder on SQuAD.

    On several processes: horovodrun -np 2 python -m training.finetune_squad, with the same options.
    """
    from training.finetune_squad import main  # noqa: PLC0415

    main(options)


@command(glue_app, GlueArguments, extra="training")
@command(app, GlueArguments, extra="training")
def glue(options: GlueArguments) -> None:
    """Fine-tune a BERT encoder on a GLUE task.

    On several processes: horovodrun -np 2 python -m training.finetune_glue, with the same options.
    """
    from training.finetune_glue import main  # noqa: PLC0415

    main(options)


@command(pretrain_app, PretrainArguments, extra="training")
@command(app, PretrainArguments, extra="training")
def pretrain(options: PretrainArguments) -> None:
    """Pre-train a BERT, from scratch or from a checkpoint.

    Every number of NVIDIA's recipe for LAMB is an option. On several processes: horovodrun -np 2 python -m
    training.pretrain, with the same options.
    """
    from training.pretrain import main  # noqa: PLC0415

    main(options)


@command(average_app, AverageArguments, extra="training")
@command(app, AverageArguments, extra="training")
def average(options: AverageArguments) -> None:
    """Average the weights of checkpoints (a model soup)."""
    from training.average import main  # noqa: PLC0415

    main(options)
