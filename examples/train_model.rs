//! Trains a model on a folder of images, one subfolder per class, and prints its accuracy: `train_model DATASET RUN`. `RUN` is
//! the folder to write; it then holds the bundle `model.bloom`, the report and the metrics.

use std::error::Error;
use std::time::SystemTime;

use bloomcast::train::features::compute_device::ComputeDeviceChoice;
use bloomcast::train::{Recipe, RunOptions, train};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dataset, out] = &arguments[..] else { return Err("usage: train_model DATASET RUN".into()) };
    let mut settings = Recipe::Frozen.settings(dataset.into());
    settings.name = "example".into();
    let options = RunOptions {
        out: out.into(),
        overwrite: false,
        cache: None,
        threads: std::thread::available_parallelism()?.get(),
        device: ComputeDeviceChoice::Cpu,
        created_at: SystemTime::now(),
    };
    let trained = train(&settings, &options, &|_| {})?;
    let evaluation = &trained.val.evaluation;
    println!("{} validation images: accuracy {:.3}", evaluation.images, evaluation.accuracy);
    Ok(())
}
