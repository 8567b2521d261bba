//! The device's side of an update.

pub mod admission;
pub mod agent;
pub mod model_loader;
pub mod store;
pub mod trial;

pub use agent::Receiver;
pub use model_loader::Model;
pub use store::Store;
