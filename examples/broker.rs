//! Runs the demo's MQTT broker in a process of its own, so that a test can kill it: `broker PORT`.

fn main() {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).expect("usage: broker PORT");
    match bloomcast::demo::broker::start(port) {
        Ok(_) => loop {
            std::thread::park();
        },
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    }
}
