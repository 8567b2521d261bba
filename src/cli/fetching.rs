//! The commands that download: `dataset fetch` and `backbone fetch`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bloomcast::fetch::{self, FetchError, Wanted, flower_photos};
use bloomcast::system::hash::sha256_hex;
use bloomcast::train::data::dataset::Dataset;
use bloomcast::vision::backbone::read_file;
use bloomcast::zoo::{self, Published};
use clap::Args;

use super::Failure;
use super::progress::Bars;

#[derive(Debug, Args)]
pub struct DatasetFetchArgs {
    /// Where the classes' folders shall lie
    #[arg(default_value = "flower_photos")]
    folder: PathBuf,
    /// Another address for the archive, with its size and hash
    #[arg(long, requires_all = ["bytes", "sha256"])]
    url: Option<String>,
    #[arg(long, requires = "url")]
    bytes: Option<u64>,
    #[arg(long, requires = "url")]
    sha256: Option<String>,
}

#[derive(Debug, Args)]
pub struct BackboneFetchArgs {
    /// A name that `backbone list` shows
    name: String,
    /// Where it shall lie [default: bloomcast/backbones in the user's cache]
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// Another address for it; its hash stays what is expected
    #[arg(long)]
    url: Option<String>,
}

/// Downloads and unpacks; then looks at what is there.
pub fn dataset(args: DatasetFetchArgs) -> Result<(), Failure> {
    let wanted = match (args.url, args.bytes, args.sha256) {
        (Some(url), Some(bytes), Some(sha256)) => Wanted { url, bytes, sha256 },
        _ => flower_photos::published(),
    };
    let bars = Bars::default();
    flower_photos::fetch(&wanted, &args.folder, &|done, of| bars.bytes("download", done, of))?;
    drop(bars);
    let dataset = Dataset::read(&args.folder)?;
    let (images, classes) = (dataset.images.len(), dataset.classes.names().join(", "));
    writeln!(std::io::stdout().lock(), "{}: {images} photographs of {classes}", args.folder.display())?;
    Ok(())
}

pub fn backbone(args: BackboneFetchArgs) -> Result<(), Failure> {
    let published = zoo::named(&args.name)
        .ok_or_else(|| anyhow!("{}: no network of that name; `bloomcast backbone list` shows them", args.name))?;
    let place = published.place(&args.to.or_else(zoo::folder).context("no home directory: name a folder with --to")?);
    let urls = args.url.map_or_else(|| published.urls.clone(), |url| vec![url]);
    if place.is_file() && sha256_hex(&read_file(&place)?) == published.sha256 {
        writeln!(std::io::stdout().lock(), "{}: already there", place.display())?;
        return Ok(());
    }
    let bars = Bars::default();
    download(&published, &urls, &place, &|done, of| bars.bytes("download", done, of))?;
    drop(bars);
    writeln!(std::io::stdout().lock(), "{}", place.display())?;
    Ok(())
}

/// Tries one address after the other, as long as it is the address that fails.
fn download(published: &Published, urls: &[String], to: &Path, progress: &dyn Fn(u64, u64)) -> anyhow::Result<()> {
    if urls.is_empty() {
        return Err(anyhow!("{}: not published as ONNX: {}", published.name, published.about));
    }
    let mut failures = Vec::new();
    for url in urls {
        let wanted = Wanted { url: url.clone(), bytes: published.bytes, sha256: published.sha256.clone() };
        match fetch::download(&wanted, to, progress) {
            Err(error @ (FetchError::Http { .. } | FetchError::Other { .. })) => failures.push(error.to_string()),
            result => return Ok(result?),
        }
    }
    Err(anyhow!("{}", failures.join("; ")))
}
