//! Everything that is fitted: the head, the last convolution, the temperature and the subspace of the OOD detector; and the
//! optimizer loop that fits them.

pub mod head;
pub mod last_conv;
pub mod ood;
pub mod temperature;
pub mod training_loop;
