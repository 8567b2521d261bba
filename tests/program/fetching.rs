//! Downloads, from a web server that misbehaves.

use std::fs;

use bloomcast::system::hash::sha256_hex;

use super::http::Server;
use super::tools::{bloomcast, failure, output};

/// A small flower_photos.tgz: two classes, and the licence beside them.
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
        // What can hardly be packed, so that the archive is about as long as its photographs.
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
fn a_broken_download_goes_on_where_it_ended() {
    let archive = archive();
    assert!(archive.len() > 20_000);
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("photos");
    let server = Server::start(archive.clone(), &[9_000, 5_000], true);
    let done = output(&mut fetch(&server, &archive, &sha256_hex(&archive), &to));
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{text}");
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(said.ends_with("photos: 20 photographs of daisy, tulips\n"), "the licence is no class: {said}");
    let began = server.began();
    assert_eq!(began.len(), 3);
    assert!(began[0] == 0 && began[1] > 0 && began[2] > began[1], "{began:?}");
    assert_eq!(fs::read(to.join("LICENSE.txt")).unwrap(), b"CC-BY");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the folder");
    // A folder that is there is not fetched again.
    assert!(output(&mut fetch(&server, &archive, "other", &to)).status.success());
    assert_eq!(server.began().len(), 3);
}

#[test]
fn what_came_is_kept_for_the_next_call_and_a_server_without_parts_begins_anew() {
    let archive = archive();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("photos");
    // Nothing comes the second time: it gives up, and keeps what it has.
    let server = Server::start(archive.clone(), &[9_000, 0], true);
    let (code, text) = failure(&mut fetch(&server, &archive, &sha256_hex(&archive), &to));
    assert!(code == 1 && text.contains(&server.url), "{text}");
    let kept = fs::metadata(dir.path().join("photos.fetched.tgz.part")).unwrap().len();
    assert!((1..=9_000).contains(&kept), "{kept}");
    assert!(!to.exists());
    let whole = Server::start(archive.clone(), &[], false);
    let done = output(&mut fetch(&whole, &archive, &sha256_hex(&archive), &to));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(fs::read_dir(to.join("daisy")).unwrap().count(), 10);
}

#[test]
fn the_beginning_of_another_file_is_forgotten() {
    let archive = archive();
    let dir = tempfile::tempdir().unwrap();
    let (to, part) = (dir.path().join("photos"), dir.path().join("photos.fetched.tgz.part"));
    // Of another file, shorter and longer than the one that is wanted.
    for there in [vec![7; 500], vec![7; archive.len() + 500]] {
        fs::write(&part, there).unwrap();
        let server = Server::start(archive.clone(), &[], true);
        let done = output(&mut fetch(&server, &archive, &sha256_hex(&archive).to_uppercase(), &to));
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(server.began().last(), Some(&0), "from the beginning");
        fs::remove_dir_all(&to).unwrap();
    }
    let held = fs::File::create(&part).unwrap();
    held.lock().unwrap();
    let server = Server::start(archive.clone(), &[], true);
    let (code, text) = failure(&mut fetch(&server, &archive, &sha256_hex(&archive), &to));
    assert!(code == 1 && text.contains("photos.fetched.tgz.part: another download writes it"), "{text}");
}

#[test]
fn another_file_than_expected_is_refused_and_deleted() {
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
