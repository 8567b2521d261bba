//! A web server on 127.0.0.1 that serves one file, supports range requests, and closes connections early where a test
//! requires it.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// A server that runs until the process ends.
pub struct Server {
    pub url: String,
    /// The offset in the file at which each response started.
    offsets: Arc<Mutex<Vec<usize>>>,
}

impl Server {
    /// Starts a server of `content`. The first responses end after `cut_at` bytes each, the others are complete. Without
    /// `ranges` the server ignores range requests.
    pub fn start(content: Vec<u8>, cut_at: &[usize], ranges: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("http://{}/file", listener.local_addr().unwrap());
        let offsets: Arc<Mutex<Vec<usize>>> = Arc::default();
        let (recorded, cuts) = (offsets.clone(), cut_at.to_vec());
        std::thread::spawn(move || {
            let mut cuts = cuts.into_iter();
            for stream in listener.incoming().map_while(Result::ok) {
                let offset = range_start(&stream).filter(|_| ranges).unwrap_or(0).min(content.len());
                recorded.lock().unwrap().push(offset);
                // A client may close the connection early.
                let _ = respond(stream, &content, offset, cuts.next().unwrap_or(usize::MAX));
            }
        });
        Server { url, offsets }
    }

    pub fn offsets(&self) -> Vec<usize> {
        self.offsets.lock().unwrap().clone()
    }
}

/// Reads a request; returns the start of its range.
fn range_start(stream: &TcpStream) -> Option<usize> {
    let mut offset = None;
    for line in BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let line = line.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            offset = range.trim_end_matches('-').parse().ok();
        }
    }
    offset
}

fn respond(mut stream: TcpStream, content: &[u8], offset: usize, length: usize) -> std::io::Result<()> {
    let body = &content[offset..];
    let status = if offset > 0 { "206 Partial Content" } else { "200 OK" };
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    stream.write_all(&body[..length.min(body.len())])
}
