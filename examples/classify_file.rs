//! Classifies an image with the built-in model, or with a bundle: `classify_file IMAGE [BUNDLE]`.

use std::error::Error;
use std::path::Path;

use bloomcast::bundle::Bundle;
use bloomcast::vision::decode;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (image, bundle) = match &arguments[..] {
        [image] => (image, Bundle::built_in()?),
        [image, bundle] => (image, Bundle::read(Path::new(bundle))?),
        _ => return Err("usage: classify_file IMAGE [BUNDLE]".into()),
    };
    let mut classifier = bundle.classifier(None)?;
    let prediction = classifier.classify(&decode::file(Path::new(image))?)?.0.clone();
    println!("{}", classifier.labels().name(prediction.class()));
    for (class, probability) in classifier.labels().names().iter().zip(&prediction.probabilities) {
        println!("{class:12} {probability:.3}");
    }
    Ok(())
}
