//! What is fitted: the head, the last convolution, the temperature, the subspace; and the loop that fits them.

pub mod head;
pub mod last_conv;
pub mod ood;
pub mod sgd;
pub mod temperature;
