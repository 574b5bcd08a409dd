"""``bertqa train``: fine-tune, pre-train and distil models, average checkpoints, and prepare data."""

from bertqa.cli.command import command, group
from training.data.commands import app as data_app
from training.options import (
    AverageArguments,
    GlueArguments,
    HardNegativesArguments,
    ImportMpnetArguments,
    PretrainArguments,
    SquadArguments,
    TeachGlueArguments,
    TeachSquadArguments,
)

app = group("Train models: fine-tune, pre-train, distil, average, and prepare data.")
app.add_typer(data_app, name="data")
squad_app, glue_app = group("Fine-tune an encoder on SQuAD."), group("Fine-tune an encoder on a GLUE task.")
teach_app = group("Write a teacher's soft labels, for --teacher-logits.")
app.add_typer(teach_app, name="teach")
hard_negatives_app = group("Make unanswerable questions that look answerable.")
import_mpnet_app = group("Make an encoder of all-mpnet-base-v2 that reads BERT's windows.")
pretrain_app, average_app = group("Pre-train a BERT."), group("Average the weights of checkpoints.")


@command(squad_app, SquadArguments, extra="training")
@command(app, SquadArguments, extra="training")
def squad(options: SquadArguments) -> None:
    """Fine-tune a BERT encoder on SQuAD.

    To use several processes: horovodrun -np 2 python -m training.finetune_squad, with the same options.
    """
    from training.finetune_squad import main  # noqa: PLC0415

    main(options)


@command(glue_app, GlueArguments, extra="training")
@command(app, GlueArguments, extra="training")
def glue(options: GlueArguments) -> None:
    """Fine-tune a BERT encoder on a GLUE task.

    To use several processes: horovodrun -np 2 python -m training.finetune_glue, with the same options.
    """
    from training.finetune_glue import main  # noqa: PLC0415

    main(options)


@command(pretrain_app, PretrainArguments, extra="training")
@command(app, PretrainArguments, extra="training")
def pretrain(options: PretrainArguments) -> None:
    """Pre-train a BERT, from scratch or from a checkpoint.

    Every number in NVIDIA's recipe for LAMB is an option. To use several processes: horovodrun -np 2 python -m
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


@command(teach_app, TeachSquadArguments, extra="training", name="squad")
def teach_squad(options: TeachSquadArguments) -> None:
    """Run a question-answering teacher over the windows of `bertqa train squad`.

    To use several processes: horovodrun -np 2 python -m training.teach squad, with the same options.
    """
    from training.teach import main  # noqa: PLC0415

    main(options)


@command(teach_app, TeachGlueArguments, extra="training", name="glue")
def teach_glue(options: TeachGlueArguments) -> None:
    """Run a classification teacher over the training set of `bertqa train glue`.

    To use several processes: horovodrun -np 2 python -m training.teach glue, with the same options.
    """
    from training.teach import main  # noqa: PLC0415

    main(options)


@command(hard_negatives_app, HardNegativesArguments, extra="training")
@command(app, HardNegativesArguments, extra="training")
def hard_negatives(options: HardNegativesArguments) -> None:
    """Make unanswerable questions by replacing names and numbers.

    The output is a file for --impossible of `bertqa train squad`.
    """
    from training.hard_negatives import main  # noqa: PLC0415

    main(options)


@command(import_mpnet_app, ImportMpnetArguments, extra="training")
@command(app, ImportMpnetArguments, extra="training")
def import_mpnet(options: ImportMpnetArguments) -> None:
    """Make an encoder of all-mpnet-base-v2 that reads BERT's windows."""
    from training.import_mpnet import main  # noqa: PLC0415

    main(options)
