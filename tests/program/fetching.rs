//! Downloads from a web server that closes connections early or serves the wrong file.

use std::fs;

use bloomcast::system::hash::sha256_hex;

use super::http::Server;
use super::tools::{bloomcast, failure, output};

/// Returns a small `flower_photos.tgz` with two classes and the licence.
fn archive() -> Vec<u8> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    let mut put = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("flower_photos/{name}"), content).unwrap();
    };
    put("LICENSE.txt", b"CC-BY");
    for i in 0..20u8 {
        // Hexadecimal digests hardly compress, so that the archive is long enough to interrupt its download.
        let noise: String = (0..60u8).map(|n| sha256_hex(&[i, n])).collect();
        put(&format!("{}/{i}.jpg", if i % 2 == 0 { "daisy" } else { "tulips" }), noise.as_bytes());
    }
    tar.into_inner().unwrap().finish().unwrap()
}

fn fetch(server: &Server, bytes: &[u8], sha256: &str, to: &std::path::Path) -> std::process::Command {
    let mut command = bloomcast();
    command.args(["dataset", "fetch", "--url", &server.url, "--bytes", &bytes.len().to_string(), "--sha256", sha256]);
    command.arg(to);
    command
}

#[test]
fn resumes_an_interrupted_download() {
    let archive = archive();
    assert!(archive.len() > 20_000);
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("photos");
    let server = Server::start(archive.clone(), &[9_000, 5_000], true);
    let result = output(&mut fetch(&server, &archive, &sha256_hex(&archive), &to));
    let text = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "{text}");
    let stdout = String::from_utf8(result.stdout).unwrap();
    assert!(stdout.ends_with("photos: 20 photographs of daisy, tulips\n"), "the licence is not a class: {stdout}");
    let offsets = server.offsets();
    assert_eq!(offsets.len(), 3);
    assert!(offsets[0] == 0 && offsets[1] > 0 && offsets[2] > offsets[1], "{offsets:?}");
    assert_eq!(fs::read(to.join("LICENSE.txt")).unwrap(), b"CC-BY");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the folder");
    // An existing folder is not downloaded again.
    assert!(output(&mut fetch(&server, &archive, "other", &to)).status.success());
    assert_eq!(server.offsets().len(), 3);
}

#[test]
fn keeps_a_partial_download_and_restarts_it_without_range_support() {
    let archive = archive();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("photos");
    // The second response is empty: the command fails and keeps the partial file.
    let server = Server::start(archive.clone(), &[9_000, 0], true);
    let (code, text) = failure(&mut fetch(&server, &archive, &sha256_hex(&archive), &to));
    assert!(code == 1 && text.contains(&server.url), "{text}");
    let kept = fs::metadata(dir.path().join("photos.fetched.tgz.part")).unwrap().len();
    assert!((1..=9_000).contains(&kept), "{kept}");
    assert!(!to.exists());
    let without_ranges = Server::start(archive.clone(), &[], false);
    let result = output(&mut fetch(&without_ranges, &archive, &sha256_hex(&archive), &to));
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    assert_eq!(fs::read_dir(to.join("daisy")).unwrap().count(), 10);
}

#[test]
fn discards_a_partial_download_of_another_file() {
    let archive = archive();
    let dir = tempfile::tempdir().unwrap();
    let (to, part) = (dir.path().join("photos"), dir.path().join("photos.fetched.tgz.part"));
    // Partial files of another archive, shorter and longer than the expected one.
    for stale in [vec![7; 500], vec![7; archive.len() + 500]] {
        fs::write(&part, stale).unwrap();
        let server = Server::start(archive.clone(), &[], true);
        let result = output(&mut fetch(&server, &archive, &sha256_hex(&archive).to_uppercase(), &to));
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        assert_eq!(server.offsets().last(), Some(&0), "from the beginning");
        fs::remove_dir_all(&to).unwrap();
    }
    let locked = fs::File::create(&part).unwrap();
    locked.lock().unwrap();
    let server = Server::start(archive.clone(), &[], true);
    let (code, text) = failure(&mut fetch(&server, &archive, &sha256_hex(&archive), &to));
    assert!(code == 1 && text.contains("photos.fetched.tgz.part: another process is downloading this file"), "{text}");
}

#[test]
fn rejects_and_deletes_a_file_with_the_wrong_hash() {
    let archive = archive();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("photos");
    let mut altered = archive.clone();
    altered[100] ^= 1;
    let server = Server::start(altered, &[], true);
    let (code, text) = failure(&mut fetch(&server, &archive, &sha256_hex(&archive), &to));
    assert!(
        code == 1
            && text.contains("photos.fetched.tgz.part from http://127.0.0.1")
            && text.contains(&sha256_hex(&archive)),
        "{text}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    let server = Server::start(b"not a network".to_vec(), &[], true);
    let fetch = |name: &str| {
        let mut command = bloomcast();
        command.args(["backbone", "fetch", name, "--url", &server.url, "--to"]).arg(dir.path());
        failure(&mut command)
    };
    let (code, text) = fetch("resnet50_torchvision");
    assert!(code == 1 && text.contains("ended after 13 of 102146338 bytes"), "{text}");
    assert!(!dir.path().join("resnet50_Opset16.onnx").exists());
    assert!(fetch("resnet51").1.contains("resnet51: no network of that name"));
}
