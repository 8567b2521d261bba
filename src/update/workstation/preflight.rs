//! Checks before a push: rejects a model that a device cannot use, or that would be a downgrade there.

use crate::bundle::Manifest;
use crate::update::protocol::ModelStatus;

/// Reason not to send a model to a device.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Incompatible {
    /// The newest bundle format that the device reads, and that of the bundle.
    #[error("the device reads bundle formats up to {0}, the bundle has format {1}")]
    Format(u32, u32),
    /// The model requires a backbone that neither the bundle nor the device has.
    #[error(
        "the model requires the backbone {required}, the device has {found}; a bundle can include its own (train --embed-backbone)"
    )]
    Network {
        /// Name and SHA-256 of the backbone that the model was trained on.
        required: String,
        /// Name and SHA-256 of the device's backbone.
        found: String,
    },
    /// The model is worse than the active one; `force` overrides this.
    #[error("{0}; --force sends it anyway")]
    Downgrade(Downgrade),
}

/// The first respect in which a model is worse than the device's active model.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Downgrade {
    /// The version is not larger.
    #[error("version {new} is not newer than the device's version {active}")]
    Version {
        /// Version of the new model.
        new: u64,
        /// Version of the active model.
        active: u64,
    },
    /// A class of the active model is missing; its name.
    #[error("the new model lacks the class {0:?} of the device's model")]
    Class(String),
    /// The accuracy on the same dataset, 0–1, is lower.
    #[error("accuracy {new:.4} is lower than the device's {active:.4} on the same dataset")]
    Accuracy {
        /// Accuracy of the new model, 0–1.
        new: f64,
        /// Accuracy of the active model, 0–1.
        active: f64,
    },
    /// The accuracy on the same dataset is equal and the loss, in nats, is higher.
    #[error("loss {new:.4} is higher than the device's {active:.4} on the same dataset")]
    Loss {
        /// Loss of the new model, in nats.
        new: f64,
        /// Loss of the active model, in nats.
        active: f64,
    },
}

/// Checks that a device can use a model, and that the model is not a downgrade there unless `force` is set.
///
/// `has_backbone` is whether the bundle includes its backbone; `status` is the device's retained model status.
///
/// # Errors
/// The first reason not to send the model; `force` suppresses only [`Incompatible::Downgrade`].
pub fn check(model: &Manifest, has_backbone: bool, status: &ModelStatus, force: bool) -> Result<(), Incompatible> {
    let format_max = status.format_max.unwrap_or(status.format);
    if format_max < model.format {
        return Err(Incompatible::Format(format_max, model.format));
    }
    if !has_backbone && model.backbone.sha256 != status.network.sha256 {
        let describe = |name: &str, sha256: &str| format!("{name} ({sha256:.12}…)");
        return Err(Incompatible::Network {
            required: describe(&model.backbone.name, &model.backbone.sha256),
            found: describe(&status.network.name, &status.network.sha256),
        });
    }
    match downgrade(model, status) {
        Some(downgrade) if !force => Err(Incompatible::Downgrade(downgrade)),
        _ => Ok(()),
    }
}

/// Compares a model with the active one; metrics only if both were measured on the same dataset.
fn downgrade(model: &Manifest, status: &ModelStatus) -> Option<Downgrade> {
    if model.version <= status.model.version {
        return Some(Downgrade::Version { new: model.version, active: status.model.version });
    }
    if let Some(missing) = status.classes.iter().find(|class| model.classes.position(class).is_none()) {
        return Some(Downgrade::Class(missing.clone()));
    }
    if model.dataset.sha256 != status.dataset {
        return None;
    }
    let (new, active) = (&model.metrics, &status.metrics);
    if new.accuracy < active.accuracy {
        return Some(Downgrade::Accuracy { new: new.accuracy, active: active.accuracy });
    }
    (new.accuracy == active.accuracy && new.loss > active.loss)
        .then_some(Downgrade::Loss { new: new.loss, active: active.loss })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;
    use crate::update::protocol::older_status;
    use crate::vision::Labels;

    /// Returns a model and the status of a device whose model is one version older with equal metrics.
    fn model_and_status() -> (Manifest, ModelStatus) {
        let model = Bundle::built_in().unwrap().manifest().clone();
        let status = older_status(&model);
        (model, status)
    }

    fn rejection(change: fn(&mut Manifest, &mut ModelStatus)) -> String {
        let (mut model, mut status) = model_and_status();
        change(&mut model, &mut status);
        check(&model, false, &status, false).unwrap_err().to_string()
    }

    #[test]
    fn rejects_a_downgrade_unless_forced() {
        let (mut model, status) = model_and_status();
        assert_eq!(check(&model, false, &status, false), Ok(()));
        assert!(rejection(|model, status| model.version = status.model.version).contains("is not newer"));
        assert!(rejection(|_, status| status.classes.push("iris".into())).contains("lacks the class \"iris\""));
        assert!(rejection(|_, status| status.metrics.accuracy += 0.01).contains("accuracy 0.9"));
        assert!(rejection(|_, status| status.metrics.loss -= 0.01).starts_with("loss 0."));
        model.classes = Labels::new(vec!["daisy".into(), "iris".into()]).unwrap();
        assert_eq!(check(&model, false, &status, true), Ok(()));
        let (model, mut status) = model_and_status();
        status.metrics.accuracy += 0.01;
        status.dataset = "other".into();
        assert_eq!(check(&model, false, &status, false), Ok(()), "metrics on another dataset are not compared");
    }

    #[test]
    fn force_does_not_override_an_incompatible_backbone_or_format() {
        let (model, mut status) = model_and_status();
        status.network.sha256 = "0123456789abcdef".into();
        let error = check(&model, false, &status, true).unwrap_err().to_string();
        assert!(error.contains("requires the backbone mobilenet_v2") && error.contains("(0123456789ab…)"), "{error}");
        assert_eq!(check(&model, true, &status, false), Ok(()), "the bundle includes its backbone");
        // The status of a device that reads format 1 alone.
        status.format_max = None;
        let model = Manifest { format: 2, ..model };
        assert_eq!(check(&model, true, &status, true), Err(Incompatible::Format(1, 2)));
    }
}
