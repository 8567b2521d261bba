//! What keeps a worse model, or one that a device cannot use, from being sent at all.

use crate::bundle::Manifest;
use crate::bundle::manifest::FORMAT;
use crate::update::protocol::ModelStatus;

/// Why a model is not sent.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Incompatible {
    #[error("the device reads bundles of format {0}, this is format {FORMAT}")]
    Format(u32),
    #[error(
        "it was made for the network {wanted}, the device has {has}; a bundle can carry its own (train --embed-backbone)"
    )]
    Network { wanted: String, has: String },
    #[error("{0}; --force sends it nevertheless")]
    Worse(String),
}

/// Whether a model is fit for a device, and no worse than what decides there. `carries`: the bundle holds its network.
pub fn check(model: &Manifest, carries: bool, note: &ModelStatus, force: bool) -> Result<(), Incompatible> {
    if note.format != FORMAT {
        return Err(Incompatible::Format(note.format));
    }
    if !carries && model.backbone.sha256 != note.network.sha256 {
        let named = |name: &str, sha256: &str| format!("{name} ({sha256:.12}…)");
        return Err(Incompatible::Network {
            wanted: named(&model.backbone.name, &model.backbone.sha256),
            has: named(&note.network.name, &note.network.sha256),
        });
    }
    match worse(model, note) {
        Some(reason) if !force => Err(Incompatible::Worse(reason)),
        _ => Ok(()),
    }
}

/// Why it would be a step back.
fn worse(model: &Manifest, note: &ModelStatus) -> Option<String> {
    if model.version <= note.model.version {
        return Some(format!("version {} is not newer than the device's {}", model.version, note.model.version));
    }
    if let Some(missing) = note.classes.iter().find(|class| model.classes.position(class).is_none()) {
        return Some(format!("it does not know {missing:?}, which the device's model does"));
    }
    if model.dataset.sha256 != note.dataset {
        return None;
    }
    let (new, old) = (&model.metrics, &note.metrics);
    if new.accuracy < old.accuracy {
        return Some(format!("accuracy {:.4} instead of {:.4} on the same photographs", new.accuracy, old.accuracy));
    }
    let as_accurate = new.accuracy == old.accuracy;
    (as_accurate && new.loss > old.loss)
        .then(|| format!("loss {:.4} instead of {:.4} on the same photographs", new.loss, old.loss))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;
    use crate::update::protocol::older_note;
    use crate::vision::Labels;

    /// A model, and a device whose model is one version older and as good.
    fn pair() -> (Manifest, ModelStatus) {
        let model = Bundle::built_in().unwrap().manifest().clone();
        let note = older_note(&model);
        (model, note)
    }

    fn refused(change: fn(&mut Manifest, &mut ModelStatus)) -> String {
        let (mut model, mut note) = pair();
        change(&mut model, &mut note);
        check(&model, false, &note, false).unwrap_err().to_string()
    }

    #[test]
    fn a_step_back_is_named_and_can_be_forced() {
        let (mut model, note) = pair();
        assert_eq!(check(&model, false, &note, false), Ok(()));
        assert!(refused(|model, note| model.version = note.model.version).contains("is not newer"));
        assert!(refused(|_, note| note.classes.push("iris".into())).contains("does not know \"iris\""));
        assert!(refused(|_, note| note.metrics.accuracy += 0.01).contains("accuracy 0.9"));
        assert!(refused(|_, note| note.metrics.loss -= 0.01).starts_with("loss 0."));
        model.classes = Labels::new(vec!["daisy".into(), "iris".into()]).unwrap();
        assert_eq!(check(&model, false, &note, true), Ok(()));
        let (model, mut note) = pair();
        note.metrics.accuracy += 0.01;
        note.dataset = "other".into();
        assert_eq!(check(&model, false, &note, false), Ok(()), "figures on other photographs tell nothing");
    }

    #[test]
    fn what_the_device_cannot_use_cannot_be_forced() {
        let (model, mut note) = pair();
        note.network.sha256 = "0123456789abcdef".into();
        let error = check(&model, false, &note, true).unwrap_err().to_string();
        assert!(error.contains("made for the network mobilenet_v2") && error.contains("(0123456789ab…)"), "{error}");
        assert_eq!(check(&model, true, &note, false), Ok(()), "it carries its own");
        note.format = 2;
        assert_eq!(check(&model, true, &note, true), Err(Incompatible::Format(2)));
    }
}
