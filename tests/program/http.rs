//! A web server on 127.0.0.1 that serves one file, in parts where it is asked to, and breaks off where the test
//! wants it to.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// Serves until the process ends.
pub struct Server {
    pub url: String,
    /// Where each answer began in the file.
    began: Arc<Mutex<Vec<usize>>>,
}

impl Server {
    /// `cut_at`: how many bytes each of the first answers sends before the connection breaks. `parts`: whether it
    /// can begin in the middle.
    pub fn start(content: Vec<u8>, cut_at: &[usize], parts: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("http://{}/file", listener.local_addr().unwrap());
        let began: Arc<Mutex<Vec<usize>>> = Arc::default();
        let (noted, cuts) = (began.clone(), cut_at.to_vec());
        std::thread::spawn(move || {
            let mut cuts = cuts.into_iter();
            for stream in listener.incoming().map_while(Result::ok) {
                let from = asked_from(&stream).filter(|_| parts).unwrap_or(0).min(content.len());
                noted.lock().unwrap().push(from);
                // A client that went away has its own test.
                let _ = answer(stream, &content, from, cuts.next().unwrap_or(usize::MAX));
            }
        });
        Server { url, began }
    }

    pub fn began(&self) -> Vec<usize> {
        self.began.lock().unwrap().clone()
    }
}

/// Reads a request; gives where its range begins.
fn asked_from(stream: &TcpStream) -> Option<usize> {
    let mut from = None;
    for line in BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let line = line.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            from = range.trim_end_matches('-').parse().ok();
        }
    }
    from
}

fn answer(mut stream: TcpStream, content: &[u8], from: usize, cut: usize) -> std::io::Result<()> {
    let rest = &content[from..];
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", rest.len())?;
    stream.write_all(&rest[..cut.min(rest.len())])
}
