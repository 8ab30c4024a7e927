"""TrainAutoencoder."""

from __future__ import annotations

from cryofleet.errors import InvalidArgument
from cryofleet.operations import parameters_of
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from services.learning import autoencoder, datasets, jobs, training
from services.learning.preparation import Preparation
from services.learning.service import inputs
from services.learning.service.registry import service


def _training_set(request: learning_pb2.TrainAutoencoderRequest, reader: Reader) -> tuple[inputs.Chosen, Preparation]:
    """The subtomograms and what is done to them, refused before anything is read where training can't work."""
    chosen = inputs.chosen(reader, request.subtomograms_uri, request.particles_uri)
    preparation = inputs.preparation(chosen.subtomograms, request.binning, request.pose_normalisation)
    autoencoder.check_box_size(preparation.prepared_size)
    if len(chosen) < 2:
        raise InvalidArgument(
            f"{chosen.source} has {len(chosen)} subtomogram; training needs at least 2, one for validation"
        )
    return chosen, preparation


def _train_needs(request: learning_pb2.TrainAutoencoderRequest, reader: Reader) -> Needs:
    chosen, preparation = _training_set(request, reader)
    inputs.augmentation(request, chosen.info, request.pose_normalisation)
    side = preparation.prepared_size
    return inputs.training_needs(
        preparation,
        len(chosen),
        batch_size=request.batch_size,
        box_bytes=inputs.TRAINING_LAYERS * autoencoder.activation_bytes(side),
        weight_bytes=autoencoder.weight_bytes(side),
    )


@service.operation(needs=_train_needs)
def train_autoencoder(request: learning_pb2.TrainAutoencoderRequest, task: Task) -> learning_pb2.TrainAutoencoderResult:
    """Train the convolutional autoencoder (Autoencoder3D) on subtomograms."""
    chosen, preparation = _training_set(request, task)
    training.use_deterministic_algorithms(task.threads)
    config = autoencoder.config(preparation.prepared_size) | inputs.data_facts(task, chosen, preparation)
    job = jobs.Job(
        network=config,
        objective={"name": autoencoder.AutoencoderLoss.NAME, "l1_penalty": request.l1_penalty},
        options=inputs.training_options(request, patience_epochs=request.patience_epochs),
        batch_size=request.batch_size,
        validation_fraction=request.validation_fraction,
        augmentation=inputs.augmentation(request, chosen.info, request.pose_normalisation),
    )
    boxes = datasets.load_prepared(chosen.read, chosen.ids, preparation, task.scratch, part(task.progress, 0.0, 0.05))
    arrays = {"boxes": boxes}
    trained = inputs.run_job(task, job, arrays, part(task.progress, 0.05, 1.0))
    training_rows, validation_rows = jobs.split(job, arrays)
    metrics = {"training_subtomograms": len(training_rows), "validation_subtomograms": len(validation_rows)}
    model_uri, metrics_uri = inputs.write_trained(
        task, trained, config | {"parameters": parameters_of(request)}, metrics
    )
    return learning_pb2.TrainAutoencoderResult(
        model_uri=model_uri,
        metrics_uri=metrics_uri,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        best_validation_loss=trained.best_validation_loss,
    )
