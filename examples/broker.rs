//! The demo's broker alone, in a process that can be killed: `broker PORT`. For the tests.

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
