//! The commands that download: `dataset fetch` and `backbone fetch`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bloomcast::fetch::{self, Download, FetchError, flower_photos};
use bloomcast::system::hash::sha256_hex;
use bloomcast::train::data::dataset::Dataset;
use bloomcast::vision::backbone::read_file;
use bloomcast::zoo::{self, ZooEntry};
use clap::Args;

use super::Failure;
use super::progress::Bars;

#[derive(Debug, Args)]
pub struct DatasetFetchArgs {
    /// Folder to unpack to, one subfolder per class
    #[arg(default_value = "flower_photos")]
    folder: PathBuf,
    /// Another URL for the archive; needs --bytes and --sha256
    #[arg(long, requires_all = ["bytes", "sha256"])]
    url: Option<String>,
    /// Size of that archive in bytes
    #[arg(long, requires = "url")]
    bytes: Option<u64>,
    /// SHA-256 of that archive, in hexadecimal
    #[arg(long, requires = "url")]
    sha256: Option<String>,
}

#[derive(Debug, Args)]
pub struct BackboneFetchArgs {
    /// Name of the backbone, see `backbone list`
    name: String,
    /// Folder to save it to [default: bloomcast/backbones in the user's cache]
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// Another URL for it; the expected SHA-256 stays the same
    #[arg(long)]
    url: Option<String>,
}

/// Downloads and unpacks a dataset, then prints the number of photographs and the classes.
///
/// # Errors
///
/// [`Failure`] if the download fails, the dataset cannot be read, or standard output cannot be written.
pub fn dataset(args: DatasetFetchArgs) -> Result<(), Failure> {
    let archive = match (args.url, args.bytes, args.sha256) {
        (Some(url), Some(bytes), Some(sha256)) => Download { url, bytes, sha256 },
        _ => flower_photos::archive(),
    };
    let bars = Bars::default();
    flower_photos::fetch(&archive, &args.folder, &|done, total| bars.bytes("download", done, total))?;
    drop(bars);
    let dataset = Dataset::read(&args.folder)?;
    let (images, classes) = (dataset.images.len(), dataset.classes.names().join(", "));
    writeln!(std::io::stdout().lock(), "{}: {images} photographs of {classes}", args.folder.display())?;
    Ok(())
}

/// Downloads a backbone of the zoo, unless its file is there with the right checksum, and prints its path.
///
/// # Errors
///
/// [`Failure`] if the name is unknown, the download fails, or standard output cannot be written.
pub fn backbone(args: BackboneFetchArgs) -> Result<(), Failure> {
    let entry = zoo::named(&args.name)
        .ok_or_else(|| anyhow!("{}: no network of that name; `bloomcast backbone list` lists them", args.name))?;
    let path = entry.path_in(&args.to.or_else(zoo::folder).context("no home directory: name a folder with --to")?);
    let urls = args.url.map_or_else(|| entry.urls.clone(), |url| vec![url]);
    if path.is_file() && sha256_hex(&read_file(&path)?) == entry.sha256 {
        writeln!(std::io::stdout().lock(), "{}: already downloaded", path.display())?;
        return Ok(());
    }
    let bars = Bars::default();
    download(&entry, &urls, &path, &|done, total| bars.bytes("download", done, total))?;
    drop(bars);
    writeln!(std::io::stdout().lock(), "{}", path.display())?;
    Ok(())
}

/// Tries the URLs in order while the error lies with the server; other errors are returned immediately.
fn download(entry: &ZooEntry, urls: &[String], to: &Path, progress: &dyn Fn(u64, u64)) -> anyhow::Result<()> {
    if urls.is_empty() {
        return Err(anyhow!("{}: not published as ONNX: {}", entry.name, entry.about));
    }
    let mut failures = Vec::new();
    for url in urls {
        let source = Download { url: url.clone(), bytes: entry.bytes, sha256: entry.sha256.clone() };
        match fetch::download(&source, to, progress) {
            Err(error @ (FetchError::Http { .. } | FetchError::Mismatch { .. })) => failures.push(error.to_string()),
            result => return Ok(result?),
        }
    }
    Err(anyhow!("{}", failures.join("; ")))
}
