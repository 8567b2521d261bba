//! Thumbnails with the class activation maps of a trained model.

use crate::train::data::image_set::HashedImage;
use crate::train::evaluate::EvaluatedSet;
use crate::train::parallel;
use crate::train::report::gallery::GalleryImage;
use crate::train::run::outcome::Trained;
use crate::vision::backbone::{Session, channels_last};
use crate::vision::class_activation_map::{class_activation_map, overlay};
use crate::vision::head::argmax;
use crate::vision::{BackboneError, Head, Labels, LastConvWeights, OnnxBackbone, Prediction, Preprocess, Preprocessor};

/// Computes class activation maps of a trained model.
pub struct ClassActivationMaps<'a> {
    network: &'a OnnxBackbone,
    last_conv: &'a LastConvWeights,
    head: &'a Head,
    preprocess: &'a Preprocess,
}

/// The session and buffers of one thread.
struct Worker {
    session: Session,
    preprocessor: Preprocessor,
    input: Vec<f32>,
}

impl<'a> ClassActivationMaps<'a> {
    /// Returns `None` if the network does not end in a 1×1 convolution and global average pooling.
    pub fn new(network: &'a OnnxBackbone, trained: &'a Trained, preprocess: &'a Preprocess) -> Option<Self> {
        let pretrained = &network.info().last_conv.as_ref()?.weights;
        let last_conv = trained.last_conv.as_ref().unwrap_or(pretrained);
        Some(ClassActivationMaps { network, last_conv, head: &trained.head, preprocess })
    }

    /// Returns the images at `indices` with the class activation map of their top class drawn over the thumbnail. Images
    /// that cannot be decoded are skipped. `threads` is at least 1.
    ///
    /// # Errors
    /// Fails if the network cannot run.
    ///
    /// # Panics
    /// Panics if a thread cannot be started.
    pub fn load(
        &self,
        labels: &Labels,
        set: &EvaluatedSet,
        indices: &[usize],
        threads: usize,
    ) -> Result<Vec<GalleryImage>, BackboneError> {
        let backbone = self.network.compile_feature_maps()?;
        let init = || {
            Ok(Worker {
                session: backbone.session()?,
                preprocessor: Preprocessor::new(self.preprocess.clone()),
                input: vec![0.0; self.preprocess.input_len()],
            })
        };
        let work = |worker: &mut Worker, n: usize| {
            self.overlaid(worker, labels, &set.images[indices[n]], &set.predictions[indices[n]])
        };
        let images = parallel::map(indices.len(), threads, "report", init, work, &|_| {})?;
        Ok(images.into_iter().flatten().collect())
    }

    fn overlaid(
        &self,
        Worker { session, preprocessor, input }: &mut Worker,
        labels: &Labels,
        image: &HashedImage,
        prediction: &Prediction,
    ) -> Result<Option<GalleryImage>, BackboneError> {
        let Ok(pixels) = image.decode() else { return Ok(None) };
        preprocessor.run(&pixels, input);
        let feature_map = channels_last(session.run(input)?, self.last_conv.inputs());
        let activations = self.last_conv.activations(&feature_map);
        let cam = class_activation_map(self.head, &activations, argmax(&prediction.probabilities));
        let mut image = GalleryImage::new(labels, image, prediction, &pixels);
        overlay(&mut image.thumbnail, &cam);
        Ok(Some(image))
    }
}
