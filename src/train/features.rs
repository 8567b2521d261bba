//! What the frozen backbone says of every photograph, computed on all cores.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use sha2::{Digest, Sha256};

use super::dataset::Labelled;
use crate::vision::{Backbone, BackboneError, Preprocess, Preprocessor, decode};

/// Features and labels of a set of photographs, in the order of the set.
#[derive(Debug, Clone, Default)]
pub struct Features {
    /// Numbers in one vector.
    pub width: usize,
    /// `[images, width]`, a photograph a row.
    pub values: Vec<f32>,
    /// The class of each row.
    pub classes: Vec<usize>,
    /// SHA-256 of each row's file.
    pub contents: Vec<[u8; 32]>,
    /// What could not be decoded, and why.
    pub left_out: Vec<(PathBuf, String)>,
}

impl Features {
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// The vector of photograph `i`, `[width]`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.width..(i + 1) * self.width]
    }

    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.width)
    }
}

/// One photograph's vector and hash, or why there is none.
type Extracted = Result<(Vec<f32>, [u8; 32]), String>;

/// Decodes each photograph once and runs the backbone on it, on `threads` threads. `progress` is told
/// how many are done, from whichever thread did the last one.
pub fn extract(
    backbone: &Backbone,
    preprocess: &Preprocess,
    images: &[Labelled],
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Features, BackboneError> {
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || -> Result<Vec<(usize, Extracted)>, BackboneError> {
        let mut session = backbone.session()?;
        let mut preprocessor = Preprocessor::new(preprocess.clone());
        let mut input = vec![0.0; preprocess.input_len()];
        let mut extracted = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(image) = images.get(i) else { return Ok(extracted) };
            let one = match decode::read_file(&image.path).and_then(|b| Ok((decode::encoded(&b)?, b))) {
                Ok((pixels, bytes)) => {
                    preprocessor.run(&pixels, &mut input);
                    Ok((session.features(&input)?, Sha256::digest(&bytes).into()))
                }
                Err(error) => Err(error.to_string()),
            };
            extracted.push((i, one));
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    let mut extracted = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1))
            .map(|n| {
                let builder = thread::Builder::new().name(format!("features-{n}"));
                builder.spawn_scoped(scope, work).expect("the system gives a thread a core")
            })
            .collect();
        let mut all = Vec::with_capacity(images.len());
        for worker in workers {
            all.extend(worker.join().expect("a worker returns its errors")?);
        }
        Ok::<_, BackboneError>(all)
    })?;
    extracted.sort_by_key(|(i, _)| *i);

    let mut features = Features { width: backbone.width(), ..Features::default() };
    for (i, one) in extracted {
        match one {
            Ok((values, content)) => {
                features.values.extend(values);
                features.classes.push(images[i].class);
                features.contents.push(content);
            }
            Err(reason) => features.left_out.push((images[i].path.clone(), reason)),
        }
    }
    Ok(features)
}
